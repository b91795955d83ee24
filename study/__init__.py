"""The experiments behind the README's tables: runs, results, tables, pictures."""
