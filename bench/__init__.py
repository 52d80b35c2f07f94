"""What mailgrpc costs, measured beside what limits it. `make bench`, or `make bench ROW=enqueue`."""
