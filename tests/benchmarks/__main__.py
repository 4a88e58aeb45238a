from tests.benchmarks import brain_cost, hybrid

hybrid.main()
for spec in brain_cost.SPECS:
    brain_cost.main(["--spec", spec])
