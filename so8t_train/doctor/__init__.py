"""What this machine can do: probes that really run, each unable to hide another."""
