"""The model that ships: people, artists and objects at the papers' counts, and its judge."""
