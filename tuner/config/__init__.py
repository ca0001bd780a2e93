"""Settings: the schema, where values come from, and the database that a study may share."""
