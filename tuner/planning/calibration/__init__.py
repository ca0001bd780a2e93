"""The cost model corrected by what runs took: observations, regression, and a residual Gaussian process."""
