-- The clock that leases run by: the database's own, in milliseconds since 1970.
CREATE VIEW clock AS SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT) AS now;

CREATE TABLE jobs (
    -- A UUID of version 7: in the order in which jobs were created.
    id TEXT PRIMARY KEY,
    request_id TEXT UNIQUE,
    -- JobState of job.proto.
    state BIGINT NOT NULL,
    created BIGINT NOT NULL,
    ended BIGINT,
    -- When a paused job may go on by itself; NULL if it waits for ResumeJob.
    retry BIGINT,
    -- Number of the latest event.
    last_event BIGINT NOT NULL,
    -- Units.
    total BIGINT NOT NULL,
    labelled BIGINT NOT NULL,
    dead BIGINT NOT NULL,
    failed BIGINT NOT NULL,
    -- DissectRequest, JobAccepted.
    request BYTEA NOT NULL,
    accepted BYTEA NOT NULL,
    -- JobDone, as far as it is known.
    done BYTEA NOT NULL,
    -- google.rpc.Status: why it is paused or failed.
    fault BYTEA
);

-- What happened in a job. Of a unit's end the result is the unit's, unless it was tried again since.
CREATE TABLE events (
    job TEXT NOT NULL,
    number BIGINT NOT NULL,
    -- Of a unit that ended.
    place BIGINT,
    -- JobEvent; of a unit that was tried again since, the UnitResult that it had.
    body BYTEA,
    PRIMARY KEY (job, number)
);

-- Units in the order of the request, from 1. Place 0 is the probing pass, whose row goes when it is through.
CREATE TABLE units (
    job TEXT NOT NULL,
    place BIGINT NOT NULL,
    layer TEXT NOT NULL,
    unit BIGINT NOT NULL,
    -- UnitState of result.proto; 0 while it has not ended.
    state BIGINT NOT NULL,
    -- Stage of job.proto that it is through.
    stage BIGINT NOT NULL,
    -- Times that it was tried to an end.
    attempts BIGINT NOT NULL,
    -- Who works on it, and until when unless that is prolonged; without an owner, when it may be taken at the earliest.
    owner TEXT,
    until BIGINT NOT NULL,
    -- Goes up each time that it is taken: writes of whoever had it before are refused.
    fence BIGINT NOT NULL,
    -- Its labels in lower case, a line each, to search in.
    labels TEXT NOT NULL,
    -- UnitSummary, once it has ended.
    summary BYTEA,
    -- ProbedUnit, from the probing pass until it has a label.
    probed BYTEA,
    -- UnitResult, once it has ended.
    result BYTEA,
    PRIMARY KEY (job, place)
);
CREATE INDEX units_by_name ON units (job, layer, unit);
CREATE INDEX units_open ON units (job, place, stage) WHERE state = 0;
CREATE INDEX units_taken ON units (job, owner) WHERE owner IS NOT NULL;

-- What the stages of a job took, and what was asked of language models behind HTTP endpoints, added up; of the probing pass also how far it is.
CREATE TABLE stages (
    job TEXT NOT NULL,
    stage BIGINT NOT NULL,
    done BIGINT NOT NULL,
    total BIGINT NOT NULL,
    seconds DOUBLE PRECISION NOT NULL,
    calls BIGINT NOT NULL,
    reused BIGINT NOT NULL,
    asked BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    answer_tokens BIGINT NOT NULL,
    cost DOUBLE PRECISION,
    PRIMARY KEY (job, stage)
);
