"""The data records: episodes, feedback, rewards, batches."""
