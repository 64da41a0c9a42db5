"""What a run keeps: requests, reducers, and the result that holds them."""
