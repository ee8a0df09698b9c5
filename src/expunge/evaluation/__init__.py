"""From prompts to a report."""
