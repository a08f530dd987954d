-- Times that whoever had it gave it back in order, and was not killed over it: the spans of a round belong together.
ALTER TABLE units ADD COLUMN rounds BIGINT NOT NULL DEFAULT 0;
