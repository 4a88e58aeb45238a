from tests.benchmarks import hybrid

hybrid.main()
