"""Images: data sets by name, the forms they come in, batches."""
