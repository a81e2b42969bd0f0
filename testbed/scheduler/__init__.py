"""What decides: queues, policies, admission, batching strategies, retraction, results, the decision log."""
