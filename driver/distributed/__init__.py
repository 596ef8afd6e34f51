"""One model on several processes: stages in a pipeline, or layers shared out, on torch.distributed."""
