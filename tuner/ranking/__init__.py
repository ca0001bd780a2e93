"""The order of records: values, pooled runs, paired rounds, and the elimination of finalists."""
