"""Chat templates and loss masks, data records, packed batches and data order."""
