from tests.benchmarks.hybrid import main

main()
