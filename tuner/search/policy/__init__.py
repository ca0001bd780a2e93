"""What runs next: forecasts by the cost model, acquisition, the strategy and its stopping rule."""
