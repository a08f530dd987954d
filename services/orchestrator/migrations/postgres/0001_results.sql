-- Results of pure calls by the SHA-256 of all that they depend on (src/results.rs).
CREATE TABLE results (
    key BYTEA PRIMARY KEY,
    value BYTEA NOT NULL
);
