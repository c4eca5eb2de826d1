"""What the ops take, beside what else there is: README.md says what is run, and how."""
