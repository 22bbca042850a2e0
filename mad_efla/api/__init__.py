"""What `import mad_efla` offers, behind its lazy names: the commands as functions, and their results."""
