"""From raw pages to a corpus: reading, filtering, removing duplicates, and a report of what became of it."""
