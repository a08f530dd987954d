-- Results of pure calls by the SHA-256 of all that they depend on (src/results.rs).
CREATE TABLE results (
    key BLOB PRIMARY KEY,
    value BLOB NOT NULL
) WITHOUT ROWID;
