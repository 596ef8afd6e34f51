"""The doors: torch.compile backend, command line, artifact, receipt."""
