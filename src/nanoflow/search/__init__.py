"""Auto-search: from a profile to the best pipeline plan, and what a plan will take. See docs/auto-search.md."""
