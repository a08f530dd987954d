-- What a result takes, what it is of, and when it was last used, in seconds since 1970 (src/room.rs).
ALTER TABLE results ADD COLUMN function TEXT NOT NULL DEFAULT '';
ALTER TABLE results ADD COLUMN bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE results ADD COLUMN used BIGINT NOT NULL DEFAULT 0;
UPDATE results SET bytes = length(key) + length(value);
CREATE INDEX results_by_use ON results (used);

-- Pictures that were made here and can be made again, by their SHA-256. They lie in the object store.
CREATE TABLE pictures (
    digest BYTEA PRIMARY KEY,
    bytes BIGINT NOT NULL,
    used BIGINT NOT NULL
);
CREATE INDEX pictures_by_use ON pictures (used);

-- Pictures that the results of jobs refer to.
CREATE TABLE pins (
    digest BYTEA NOT NULL,
    job TEXT NOT NULL,
    PRIMARY KEY (digest, job)
);
