"""What clients say over HTTP and what they are told: pure functions, no sockets, no processes, no clock."""
