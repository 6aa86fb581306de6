"""What every room shares: problems, the driver, solutions, result codes, stopping criteria."""
