"""What every experiment uses: data, training, results, figures."""
