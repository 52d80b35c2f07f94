"""PostgreSQL: the truth. One file a noun; the SQL stands beside the function that runs it."""
