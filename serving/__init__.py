"""Serving: requests, the paged KV cache's bookkeeping, and the scheduler that turns them into steps."""
