"""What the ops take, beside what else there is: record, gpu, cpu and tiles are run by hand; README.md says how."""
