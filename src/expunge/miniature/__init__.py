"""The miniature model: people, artists and objects at the papers' counts; without weights as yet."""
