"""WHERE rows come from: files, folders and the hub, read without loss; assets; the audit before training."""
