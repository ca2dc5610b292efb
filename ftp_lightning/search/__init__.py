"""Schedule search: allocations to start from, operators that keep the budget, a memoised fitness, the genetic loop."""
