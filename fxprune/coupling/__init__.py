"""Which channels stand or fall together: labels (fields), rules (one per op family), groups (solve)."""
