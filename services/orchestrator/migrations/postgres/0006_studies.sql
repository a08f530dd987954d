CREATE TABLE studies (
    -- A UUID of version 7: in the order in which studies were created.
    id TEXT PRIMARY KEY,
    created BIGINT NOT NULL,
    -- Study, without what it shows; then what it shows, as a Study of that alone.
    body BYTEA NOT NULL,
    shown BYTEA NOT NULL
);

-- What raters said of units.
CREATE TABLE ratings (
    study TEXT NOT NULL,
    -- Of the unit among those that are shown, from 0.
    place BIGINT NOT NULL,
    rater TEXT NOT NULL,
    rated BIGINT NOT NULL,
    -- Rating.
    body BYTEA NOT NULL,
    PRIMARY KEY (study, place, rater)
);
