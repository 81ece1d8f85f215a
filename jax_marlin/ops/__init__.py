"""The ops: each file holds one primitive with its shape rule, lowerings and batching."""
