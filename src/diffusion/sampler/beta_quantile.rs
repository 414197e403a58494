//! Quantiles of the beta distribution B(0.6, 0.6), which one spread of noise levels is made of. In f64.

/// Both parameters.
const SHAPE: f64 = 0.6;

/// The x in 0 … 1 below which the share `p` of the distribution lies; to some 1e-15 of x or of 1−x.
pub(super) fn beta_quantile(p: f64) -> f64 {
    if p <= 0.0 || p >= 1.0 {
        return p.clamp(0.0, 1.0);
    }
    // The distribution is symmetric, and small numbers keep their digits.
    if p > 0.5 {
        return 1.0 - beta_quantile(1.0 - p);
    }
    let (mut low, mut high) = (0.0f64, 0.5f64);
    loop {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            return middle;
        }
        if share_below(middle) < p {
            low = middle;
        } else {
            high = middle;
        }
    }
}

/// The regularized incomplete beta function I_x(0.6, 0.6) for x up to one half: x^a / (a·B(a, a)) times the series
/// of (1−t)^(a−1) integrated term by term (<https://dlmf.nist.gov/8.17.E8> and following).
fn share_below(x: f64) -> f64 {
    let whole = {
        let gamma = libm::tgamma(SHAPE);
        gamma * gamma / libm::tgamma(2.0 * SHAPE)
    };
    let (mut coefficient, mut sum, mut k) = (1.0, 0.0, 0.0);
    loop {
        let term = coefficient / (SHAPE + k);
        sum += term;
        if term < sum * 1e-17 {
            return x.powf(SHAPE) * sum / whole;
        }
        k += 1.0;
        coefficient *= x * (k - SHAPE) / k;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_scipy_s() {
        // scipy.stats.beta.ppf(p, 0.6, 0.6)
        for (p, expected) in EXPECTED {
            assert!((beta_quantile(p) / expected - 1.0).abs() < 1e-13, "{p}: {} {expected}", beta_quantile(p));
        }
    }

    const EXPECTED: [(f64, f64); 7] = [
        (0.0001, 3.998377158137721e-07),
        (0.03, 0.005368281184035397),
        (0.125, 0.05715636362241408),
        (0.5, 0.5000000000000001),
        (0.6, 0.6372990092467856),
        (0.96, 0.9913362306152167),
        (0.999, 0.9999814412614826),
    ];
}
