"""The bundle: what an exporter writes and everything else reads, file by file."""
