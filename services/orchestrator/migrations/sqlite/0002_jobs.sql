-- The clock that leases run by: the database's own, in milliseconds since 1970.
CREATE VIEW clock AS SELECT CAST(unixepoch('subsec') * 1000 AS INTEGER) AS now;

CREATE TABLE jobs (
    -- A UUID of version 7: in the order in which jobs were created.
    id TEXT PRIMARY KEY,
    request_id TEXT UNIQUE,
    -- JobState of job.proto.
    state INTEGER NOT NULL,
    created INTEGER NOT NULL,
    ended INTEGER,
    -- When a paused job may go on by itself; NULL if it waits for ResumeJob.
    retry INTEGER,
    -- Number of the latest event.
    last_event INTEGER NOT NULL,
    -- Units.
    total INTEGER NOT NULL,
    labelled INTEGER NOT NULL,
    dead INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    -- DissectRequest, JobAccepted.
    request BLOB NOT NULL,
    accepted BLOB NOT NULL,
    -- JobDone, as far as it is known.
    done BLOB NOT NULL,
    -- google.rpc.Status: why it is paused or failed.
    fault BLOB
);

-- What happened in a job. Of a unit's end the result is the unit's, unless it was tried again since.
CREATE TABLE events (
    job TEXT NOT NULL,
    number INTEGER NOT NULL,
    -- Of a unit that ended.
    place INTEGER,
    -- JobEvent; of a unit that was tried again since, the UnitResult that it had.
    body BLOB,
    PRIMARY KEY (job, number)
);

-- Units in the order of the request, from 1. Place 0 is the probing pass, whose row goes when it is through.
CREATE TABLE units (
    job TEXT NOT NULL,
    place INTEGER NOT NULL,
    layer TEXT NOT NULL,
    unit INTEGER NOT NULL,
    -- UnitState of result.proto; 0 while it has not ended.
    state INTEGER NOT NULL,
    -- Stage of job.proto that it is through.
    stage INTEGER NOT NULL,
    -- Times that it was tried to an end.
    attempts INTEGER NOT NULL,
    -- Who works on it, and until when unless that is prolonged; without an owner, when it may be taken at the earliest.
    owner TEXT,
    until INTEGER NOT NULL,
    -- Goes up each time that it is taken: writes of whoever had it before are refused.
    fence INTEGER NOT NULL,
    -- Its labels in lower case, a line each, to search in.
    labels TEXT NOT NULL,
    -- UnitSummary, once it has ended.
    summary BLOB,
    -- ProbedUnit, from the probing pass until it has a label.
    probed BLOB,
    -- UnitResult, once it has ended.
    result BLOB,
    PRIMARY KEY (job, place)
);
CREATE INDEX units_by_name ON units (job, layer, unit);
CREATE INDEX units_open ON units (job, place, stage) WHERE state = 0;
CREATE INDEX units_taken ON units (job, owner) WHERE owner IS NOT NULL;

-- What the stages of a job took, and what was asked of language models behind HTTP endpoints, added up; of the probing pass also how far it is.
CREATE TABLE stages (
    job TEXT NOT NULL,
    stage INTEGER NOT NULL,
    done INTEGER NOT NULL,
    total INTEGER NOT NULL,
    seconds REAL NOT NULL,
    calls INTEGER NOT NULL,
    reused INTEGER NOT NULL,
    asked INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    answer_tokens INTEGER NOT NULL,
    cost REAL,
    PRIMARY KEY (job, stage)
);
