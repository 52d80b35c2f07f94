"""What the rows are measured against. Frozen: a change here makes old results void."""
