"""What the data is: episodes, feedback, rewards, batches."""
