from transformers_moe_offload.prefetch.predictors.ranking import HitRates


def test_hit_rates_never_rise_with_the_rank():
    rates = HitRates(3, expected=0.5)
    for _ in range(20):
        rates.learn([0.5, 1.0, 0.0])
    first, second, third = rates.confidences()
    assert first == second == 0.5 > third
