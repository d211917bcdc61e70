"""One file a resource: each route parses, calls one use case and shapes the answer."""
