//! The training loss and its gradient in closed form. The loss of a micro-batch of n items over all ranks is
//! (1/n)·Σᵢ [wᵢ·mseᵢ + prior_weight·mse of i's class row]; a rank computes its own rows' part, and parts add up to the
//! whole because each is divided by the global n already. What the network predicts and why is not known here.

/// The shape of one row: the target has (channels, plane) values; the prediction has as many, or twice as many channels
/// (a learned variance), of which the second half takes no part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowShape {
    pub target_channels: usize,
    pub prediction_channels: usize,
    /// h·w.
    pub plane: usize,
}

/// A rank's part of a micro-batch's loss.
#[derive(Clone, Debug, PartialEq)]
pub struct LossValue {
    /// Σ weight·mse over the rank's rows, not divided by the accumulation; the ranks' sum is the micro-batch's loss.
    pub loss: f64,
    /// The mean squared error of each row, unweighted; tells which row went wrong when the loss is not finite.
    pub row_mse: Vec<f64>,
}

/// The weight of each of a rank's rows, instances first and then their class rows (if any): wᵢ/n, prior_weight/n.
/// `instance_weights`: the Min-SNR weight of each instance row's own time step, or ones; `items`: n, of all ranks.
pub fn row_weights(instance_weights: &[f32], class_rows: usize, prior_weight: f64, items: usize) -> Vec<f64> {
    assert!(class_rows == 0 || class_rows == instance_weights.len(), "class rows without their instances");
    let n = items.max(1) as f64;
    let class = std::iter::repeat_n(prior_weight / n, class_rows);
    instance_weights.iter().map(|&w| f64::from(w) / n).chain(class).collect()
}

/// The loss part of some rows, and in `gradient` the derivative of (loss part / accumulation) by the prediction.
///
/// `prediction`, `gradient`: (rows, prediction channels, plane); `target`: (rows, target channels, plane); `weights`:
/// one a row, of [`row_weights`]. Sums are carried in f64 in the order of the rows and their elements, so the value
/// does not depend on threads. No rows at all give 0.
pub fn loss_and_gradient(
    prediction: &[f32],
    target: &[f32],
    shape: RowShape,
    weights: &[f64],
    accumulation: usize,
    gradient: &mut [f32],
) -> LossValue {
    let (used, predicted) = (shape.target_channels * shape.plane, shape.prediction_channels * shape.plane);
    assert!(
        predicted == used || predicted == 2 * used,
        "a prediction of neither the target's channels nor twice as many"
    );
    assert_eq!(target.len(), weights.len() * used, "target and weights of different numbers of rows");
    assert_eq!(prediction.len(), weights.len() * predicted, "prediction and weights of different numbers of rows");
    assert_eq!(gradient.len(), prediction.len(), "prediction and gradient of different sizes");
    let mut value = LossValue { loss: 0.0, row_mse: Vec::with_capacity(weights.len()) };
    for (row, &weight) in weights.iter().enumerate() {
        let wanted = &target[row * used..][..used];
        let got = &prediction[row * predicted..][..used];
        let (slope, unused) = gradient[row * predicted..][..predicted].split_at_mut(used);
        let factor = 2.0 * weight / (used as f64 * accumulation.max(1) as f64);
        let mut sum = 0.0f64;
        for ((s, &p), &t) in slope.iter_mut().zip(got).zip(wanted) {
            let difference = f64::from(p - t);
            sum += difference * difference;
            *s = (factor * difference) as f32;
        }
        unused.fill(0.0);
        let mse = sum / used as f64;
        value.loss += weight * mse;
        value.row_mse.push(mse);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::{Draws, Purpose, Row};

    const SHAPE: RowShape = RowShape { target_channels: 2, prediction_channels: 2, plane: 6 };

    fn values(n: usize, item: u64) -> Vec<f32> {
        let mut v = vec![0f32; n];
        Draws::new(0).normal(Purpose::Noise, Row::Instance, item, &mut v);
        v
    }

    #[test]
    fn the_loss_is_the_contract_s() {
        let (prediction, target) = (values(48, 0), values(48, 1));
        let weights = row_weights(&[0.25, 1.0], 2, 0.7, 2);
        let mut gradient = vec![0f32; 48];
        let value = loss_and_gradient(&prediction, &target, SHAPE, &weights, 1, &mut gradient);
        let mse: Vec<f64> = (0..4)
            .map(|r| (r * 12..r * 12 + 12).map(|i| f64::from(prediction[i] - target[i]).powi(2)).sum::<f64>() / 12.0)
            .collect();
        let instances = (0.25 * mse[0] + mse[1]) / 2.0;
        let class = (mse[2] + mse[3]) / 2.0;
        assert!((value.loss - (instances + 0.7 * class)).abs() < 1e-12);
        assert_eq!(value.row_mse.len(), 4);
    }

    #[test]
    fn the_gradient_is_the_slope_of_the_loss_over_the_accumulation() {
        let (mut prediction, target) = (values(24, 2), values(24, 3));
        let weights = row_weights(&[0.5, 1.5], 0, 1.0, 5);
        let mut gradient = vec![0f32; 24];
        loss_and_gradient(&prediction, &target, SHAPE, &weights, 3, &mut gradient);
        let mut ignored = vec![0f32; 24];
        for i in 0..24 {
            let (x, h) = (prediction[i], 1e-2f32);
            prediction[i] = x + h;
            let above = loss_and_gradient(&prediction, &target, SHAPE, &weights, 3, &mut ignored).loss;
            prediction[i] = x - h;
            let below = loss_and_gradient(&prediction, &target, SHAPE, &weights, 3, &mut ignored).loss;
            prediction[i] = x;
            let slope = (above - below) / f64::from((x + h) - (x - h)) / 3.0;
            assert!((slope - f64::from(gradient[i])).abs() < 1e-6, "{i}: {slope} {}", gradient[i]);
        }
    }

    #[test]
    fn ranks_parts_add_up_whatever_the_split() {
        let (prediction, target) = (values(36, 4), values(36, 5));
        let weights = row_weights(&[0.3, 0.9, 1.0], 0, 1.0, 3);
        let mut whole = vec![0f32; 36];
        let total = loss_and_gradient(&prediction, &target, SHAPE, &weights, 1, &mut whole);
        let mut parts = vec![0f32; 36];
        let mut sum = 0.0;
        for (from, to) in [(0, 1), (1, 1), (1, 3)] {
            let range = from * 12..to * 12;
            let part = loss_and_gradient(
                &prediction[range.clone()],
                &target[range.clone()],
                SHAPE,
                &weights[from..to],
                1,
                &mut parts[range],
            );
            sum += part.loss;
        }
        assert_eq!(parts, whole);
        assert!((sum - total.loss).abs() < 1e-15);
    }

    #[test]
    fn a_learned_variance_gets_no_gradient() {
        let shape = RowShape { target_channels: 3, prediction_channels: 6, plane: 4 };
        let (prediction, target) = (values(48, 6), values(24, 7));
        let mut gradient = vec![f32::NAN; 48];
        let value = loss_and_gradient(&prediction, &target, shape, &[0.5, 0.5], 1, &mut gradient);
        for row in 0..2 {
            assert!(gradient[row * 24 + 12..row * 24 + 24].iter().all(|&g| g == 0.0));
            let i = row * 24 + 5;
            assert_eq!(gradient[i], (f64::from(prediction[i] - target[row * 12 + 5]) / 12.0) as f32);
        }
        assert!(value.loss.is_finite());
    }
}
