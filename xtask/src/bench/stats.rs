//! Medians and spreads of rounds.

/// The middle of some measurements, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Median {
    /// The middle one; the mean of both for an even number.
    pub(crate) value: f64,
    /// Half the distance from the first to the third quartile, as a part of the median.
    pub(crate) spread: f64,
}

/// The median; zero without measurements.
pub(crate) fn median(samples: &[f64]) -> Median {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let value = quantile(&sorted, 0.5);
    let range = quantile(&sorted, 0.75) - quantile(&sorted, 0.25);
    let spread = if value == 0.0 {
        0.0
    } else {
        range / 2.0 / value
    };
    Median { value, spread }
}

/// Medians' ratio of two that were measured in turn: the median of the rounds' own ratios, in which
/// a machine that is slower for a while does not show.
pub(crate) fn ratio(samples: &[f64], baseline: &[f64]) -> Median {
    let ratios: Vec<f64> = samples.iter().zip(baseline).map(|(a, b)| a / b).collect();
    median(&ratios)
}

/// The value below which a part of the sorted ones lie, between two by their distance.
pub(crate) fn quantile(sorted: &[f64], part: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let place = part * last as f64;
    let (low, high) = (
        sorted[place.floor() as usize],
        sorted[place.ceil() as usize],
    );
    low + (high - low) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_whatever_the_ends_are() {
        let median = median(&[3.0, 1000.0, 2.0, 1.0, 4.0]);
        assert_eq!(
            median,
            Median {
                value: 3.0,
                spread: 1.0 / 3.0
            }
        );
        assert_eq!(super::median(&[]).value, 0.0);
    }

    #[test]
    fn a_ratio_is_taken_round_by_round() {
        let median = ratio(&[2.0, 20.0, 200.0], &[1.0, 10.0, 100.0]);
        assert_eq!(
            median,
            Median {
                value: 2.0,
                spread: 0.0
            }
        );
    }
}
