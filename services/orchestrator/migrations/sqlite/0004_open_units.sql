-- With `state` among its columns, though all have the same: SQLite would take the primary key otherwise, and look at every unit that has ended before the next
-- that is open.
DROP INDEX units_open;
CREATE INDEX units_open ON units (job, state, place, stage) WHERE state = 0;
-- To count a job's open units by stage without a look at each: nearly all of a large job's wait for their turn at stage 1, and are what is left.
CREATE INDEX units_by_stage ON units (job, stage, place) WHERE state = 0 AND stage <> 1;
