"""The miniature: people, artists and objects at the papers' counts; its gates are not met yet."""
