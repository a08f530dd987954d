CREATE TABLE studies (
    -- A UUID of version 7: in the order in which studies were created.
    id TEXT PRIMARY KEY,
    created INTEGER NOT NULL,
    -- Study, without what it shows; then what it shows, as a Study of that alone.
    body BLOB NOT NULL,
    shown BLOB NOT NULL
);

-- What raters said of units.
CREATE TABLE ratings (
    study TEXT NOT NULL,
    -- Of the unit among those that are shown, from 0.
    place INTEGER NOT NULL,
    rater TEXT NOT NULL,
    rated INTEGER NOT NULL,
    -- Rating.
    body BLOB NOT NULL,
    PRIMARY KEY (study, place, rater)
);
