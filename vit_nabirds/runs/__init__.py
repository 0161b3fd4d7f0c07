"""What a run leaves in its workdir, and how it is read again."""
