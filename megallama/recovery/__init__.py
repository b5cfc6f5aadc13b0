"""When something breaks: who watches the ranks of a run, and what is said and done about it."""
