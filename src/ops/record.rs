//! What ops leave for the way back. While a segment's forward is recorded, each op notes its operands, its result and its
//! own `bwd`; [`Record::pull`] goes through the notes backwards. candle's own graph would do the same, but begins every
//! gradient with zeros and adds to them, which writes and reads each activation's gradient three times more, and copies
//! every input of a segment. Gradients that nobody wants are not computed: those of what depends on no weight that trains
//! and on no input whose gradient goes further. Outside of a recording ops are candle's, so that tests can go that way, too.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{CustomOp1, CustomOp2, CustomOp3, Result, Shape, Tensor, TensorId, bail};

/// The gradients of an op's operands by that of its result; none for one that has none.
type Back = Box<dyn Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

struct Step {
    operands: Vec<TensorId>,
    result: TensorId,
    back: Back,
}

/// The ops of one forward, in order, with what they need on the way back.
#[derive(Default)]
pub struct Record {
    steps: Vec<Step>,
    /// Inputs and results, and whether their gradients are wanted: whatever else an op is given would take no gradient any
    /// further.
    known: HashMap<TensorId, bool>,
}

thread_local! {
    static RECORD: RefCell<Option<Record>> = const { RefCell::new(None) };
}

/// Runs `forward` on this thread, and records its ops from these inputs on, each of which says whether its gradient is wanted.
/// Every tensor an op takes must be one of them, or the result of an op.
pub fn record<R>(
    inputs: impl IntoIterator<Item = (TensorId, bool)>,
    forward: impl FnOnce() -> Result<R>,
) -> Result<(R, Record)> {
    // An outer recording goes on afterwards, also after an error or a panic.
    struct Outer(Option<Record>);
    impl Drop for Outer {
        fn drop(&mut self) {
            RECORD.set(self.0.take());
        }
    }
    let mut known = HashMap::new();
    for (input, wanted) in inputs {
        // One that is given twice is wanted if one of both is.
        *known.entry(input).or_default() |= wanted;
    }
    let _outer = Outer(RECORD.replace(Some(Record { steps: Vec::new(), known })));
    let result = forward()?;
    Ok((result, RECORD.take().unwrap_or_default()))
}

/// Notes that `result` was made of `operands`, if this thread records: `back` gives their gradients by the result's. For
/// what is no op of this module, such as candle's own.
pub fn noted(
    operands: &[&Tensor],
    result: Tensor,
    back: impl Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Tensor> {
    note(operands, result, false, |_| back)
}

/// The same; `trains`: its way back has something to do for weights. `back` is told for which operands a gradient is wanted.
fn note<B: Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static>(
    operands: &[&Tensor],
    result: Tensor,
    trains: bool,
    back: impl FnOnce(&[bool]) -> B,
) -> Result<Tensor> {
    RECORD.with_borrow_mut(|record| {
        let Some(record) = record else { return Ok(()) };
        let mut wanted = Vec::with_capacity(operands.len());
        for operand in operands {
            match record.known.get(&operand.id()) {
                Some(&known) => wanted.push(known),
                None => bail!("an op was given a tensor {:?} that no recorded op has made", operand.shape()),
            }
        }
        let comes_back = trains || wanted.contains(&true);
        record.known.insert(result.id(), comes_back);
        if comes_back {
            let operands = operands.iter().map(|operand| operand.id()).collect();
            record.steps.push(Step { operands, result: result.id(), back: Box::new(back(&wanted)) });
        }
        Ok(())
    })?;
    Ok(result)
}

fn is_recording() -> bool {
    RECORD.with_borrow(Option::is_some)
}

/// `x` with its elements one after the other.
fn contiguous(x: &Tensor) -> Result<Tensor> {
    if x.is_contiguous() {
        return Ok(x.clone());
    }
    noted(&[x], x.contiguous()?, |dy| Ok(vec![Some(dy.clone())]))
}

/// Applies an op of one activation, whose `bwd` looks at that and not at the result.
pub fn apply1<C: CustomOp1 + Send + Sync + 'static>(x: &Tensor, op: C) -> Result<Tensor> {
    let x = contiguous(x)?;
    if !is_recording() {
        return x.apply_op1(op);
    }
    let (y, held) = (x.apply_op1_no_bwd(&op)?, x.clone());
    // Were the result held, it would be there for nothing until the way back.
    noted(&[&x], y, move |dy| Ok(vec![op.bwd(&held, dy, dy)?]))
}

/// Applies an op with weights, some of which train if it `trains`. `back` adds what they get to their gradients, and is told
/// whether the activation's is wanted.
pub fn apply1_with_weights<C: CustomOp1 + Send + Sync + 'static>(
    x: &Tensor,
    op: C,
    trains: bool,
    back: fn(&C, x: &Tensor, dy: &Tensor, wanted: bool) -> Result<Option<Tensor>>,
) -> Result<Tensor> {
    let x = contiguous(x)?;
    if !is_recording() {
        return x.apply_op1(op);
    }
    let (y, held) = (x.apply_op1_no_bwd(&op)?, x.clone());
    note(&[&x], y, trains, move |wanted| {
        let wanted = wanted[0];
        move |dy: &Tensor| Ok(vec![back(&op, &held, dy, wanted)?])
    })
}

/// Applies an op whose way back asks for no more of the activation than its shape.
pub fn apply1_by_shape<C: CustomOp1 + Send + Sync + 'static>(
    x: &Tensor,
    op: C,
    back: fn(&C, &Shape, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let x = contiguous(x)?;
    if !is_recording() {
        return x.apply_op1(op);
    }
    let (y, shape) = (x.apply_op1_no_bwd(&op)?, x.shape().clone());
    noted(&[&x], y, move |dy| Ok(vec![Some(back(&op, &shape, dy)?)]))
}

/// The same of two.
pub fn apply2_by_shape<C: CustomOp2 + Send + Sync + 'static>(
    a: &Tensor,
    b: &Tensor,
    op: C,
    back: fn(&C, [&Shape; 2], &Tensor) -> Result<[Tensor; 2]>,
) -> Result<Tensor> {
    let (a, b) = (contiguous(a)?, contiguous(b)?);
    if !is_recording() {
        return a.apply_op2(&b, op);
    }
    let (y, shapes) = (a.apply_op2_no_bwd(&b, &op)?, [a.shape().clone(), b.shape().clone()]);
    noted(&[&a, &b], y, move |dy| Ok(back(&op, shapes.each_ref(), dy)?.map(Some).to_vec()))
}

/// Applies an op of three activations, whose `bwd` looks at all of them and at the result.
pub fn apply3<C: CustomOp3 + Send + Sync + 'static>([a, b, c]: [&Tensor; 3], op: C) -> Result<Tensor> {
    let (a, b, c) = (contiguous(a)?, contiguous(b)?, contiguous(c)?);
    if !is_recording() {
        return a.apply_op3(&b, &c, op);
    }
    let y = a.apply_op3_no_bwd(&b, &c, &op)?;
    let (held, of) = ([a.clone(), b.clone(), c.clone()], y.clone());
    noted(&[&a, &b, &c], y, move |dy| {
        let (da, db, dc) = op.bwd(&held[0], &held[1], &held[2], &of, dy)?;
        Ok(vec![da, db, dc])
    })
}

/// x times a factor.
pub fn scale(x: &Tensor, factor: f64) -> Result<Tensor> {
    noted(&[x], x.affine(factor, 0.0)?, move |dy| Ok(vec![Some(dy.affine(factor, 0.0)?)]))
}

/// Sums of gradients by what they are gradients of.
#[derive(Default)]
struct Sums(HashMap<TensorId, Tensor>);

impl Sums {
    fn add(&mut self, of: TensorId, gradient: Tensor) -> Result<()> {
        let sum = match self.0.remove(&of) {
            Some(sum) => super::add(&sum, &gradient)?,
            None => gradient,
        };
        self.0.insert(of, sum);
        Ok(())
    }
}

impl Record {
    /// Pulls the gradients `dys` of `results` back to `inputs`; none for an input whose gradient is not wanted, or that no
    /// result depends on. Weights'
    /// gradients are added to where they are summed up on the way. What an op held goes as soon as it is done.
    pub fn pull(
        mut self,
        results: Vec<Tensor>,
        dys: Vec<Option<Tensor>>,
        inputs: Vec<Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let mut sums = Sums::default();
        for (result, dy) in results.into_iter().zip(dys) {
            let Some(dy) = dy else { continue };
            debug_assert_eq!(result.shape(), dy.shape());
            match self.known.get(&result.id()) {
                Some(true) => sums.add(result.id(), dy)?,
                Some(false) => {}
                None => bail!("a result {:?} was made by no recorded op", result.shape()),
            }
        }
        let inputs: Vec<TensorId> = inputs.into_iter().map(|input| input.id()).collect();
        while let Some(Step { operands, result, back }) = self.steps.pop() {
            let Some(dy) = sums.0.remove(&result) else { continue };
            let gradients = back(&dy)?;
            drop((dy, back));
            debug_assert_eq!(gradients.len(), operands.len());
            for (operand, gradient) in operands.into_iter().zip(gradients) {
                if let Some(gradient) = gradient.filter(|_| self.known.get(&operand) == Some(&true)) {
                    sums.add(operand, gradient)?;
                }
            }
        }
        // An input that is given twice has its gradient once.
        Ok(inputs.iter().map(|input| sums.0.remove(input)).collect())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::ops::testing::{numbers, weight};
    use crate::ops::{Activation, activation, add, cat_channels, linear};

    fn tensor(seed: u64, shape: (usize, usize)) -> Tensor {
        Tensor::from_vec(numbers(seed, shape.0 * shape.1), shape, &Device::Cpu).unwrap()
    }

    fn all(inputs: &[Tensor]) -> impl Iterator<Item = (TensorId, bool)> {
        inputs.iter().map(|input| (input.id(), true))
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// A product of what was joined, a tensor that three ops take, and one that nothing depends on.
    fn network(x: &Tensor, w: &crate::device::WeightRef) -> Result<[Tensor; 2]> {
        let h = linear(x, w, None)?;
        let gated = activation(&h, Activation::Silu)?;
        let sum = add(&add(&h, &gated)?, &scale(&h, 0.5)?)?;
        let unused = activation(&sum, Activation::Gelu)?;
        drop(unused);
        Ok([cat_channels(&[&sum, &gated])?, h])
    }

    #[test]
    fn gradients_are_those_of_candles_own_graph() {
        let (x, dys) = (tensor(1, (3, 4)), [tensor(2, (3, 10)), tensor(3, (3, 5))]);
        let [ours, theirs] = [0, 1].map(|_| weight(4, &[5, 4], DType::F32, 0.0).unwrap());
        let inputs = [x.clone(), tensor(9, (1, 1))];
        let (results, record) = record(all(&inputs), || network(&inputs[0], &ours)).unwrap();
        let got = record.pull(results.to_vec(), dys.clone().map(Some).to_vec(), inputs.to_vec()).unwrap();
        assert!(got[1].is_none());
        let leaf = Var::from_tensor(&x).unwrap();
        let [a, b] = network(&leaf, &theirs).unwrap();
        let sum = ((a * &dys[0]).unwrap().sum_all().unwrap() + (b * &dys[1]).unwrap().sum_all().unwrap()).unwrap();
        let want = sum.backward().unwrap();
        let close = |a: Vec<f32>, b: Vec<f32>| a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-6 * (1.0 + b.abs()));
        assert!(close(values(got[0].as_ref().unwrap()), values(want.get(&leaf).unwrap())));
        assert!(close(ours.grad(), theirs.grad()) && ours.grad().iter().any(|&g| g != 0.0));
        for (result, plain) in results.iter().zip(network(&x, &theirs).unwrap()) {
            assert_eq!(values(result), values(&plain));
        }
    }

    /// A weight that trains behind an input, then one that does not, which takes the gradient on to another input.
    #[test]
    fn what_nobody_wants_is_not_computed() {
        let inputs = [tensor(1, (3, 4)), tensor(2, (3, 4))];
        let [trained, frozen] = [true, false].map(weight_of);
        let run = |wanted: [bool; 2]| {
            let given = inputs.iter().map(Tensor::id).zip(wanted);
            let (y, record) = record(given, || {
                let a = linear(&activation(&inputs[0], Activation::Silu)?, &trained, None)?;
                let b = linear(&activation(&inputs[1], Activation::Silu)?, &frozen, None)?;
                Ok([add(&a, &b)?, b])
            })
            .unwrap();
            let steps = record.steps.len();
            let dys = [Some(tensor(3, (3, 5))), Some(tensor(4, (3, 5)))];
            let got = record.pull(y.to_vec(), dys.to_vec(), inputs.to_vec()).unwrap();
            (steps, got.iter().map(|gradient| gradient.as_ref().map(values)).collect::<Vec<_>>())
        };
        let (steps, whole) = run([true, true]);
        assert!(steps == 5 && whole.iter().all(Option::is_some));
        let once = trained.grad();
        // Neither the activations nor the frozen layer have a way back; the trained one has.
        assert_eq!(run([false, false]), (2, vec![None, None]));
        let twice: Vec<f32> = once.iter().map(|gradient| gradient + gradient).collect();
        assert_eq!(trained.grad(), twice);
        assert_eq!(run([false, true]), (4, vec![None, whole[1].clone()]));
        assert_eq!(run([true, false]), (3, vec![whole[0].clone(), None]));
    }

    fn weight_of(trains: bool) -> crate::device::WeightRef {
        crate::device::WeightRef::alone("w", &[5, 4], &numbers(7, 20), trains).unwrap()
    }

    #[test]
    fn a_result_without_a_gradient_is_passed_over() {
        let x = tensor(1, (2, 2));
        let inputs = [x.clone()];
        let (y, record) = record(all(&inputs), || scale(&x, 3.0)).unwrap();
        assert!(record.pull(vec![y], vec![None], inputs.to_vec()).unwrap()[0].is_none());
    }

    #[test]
    fn strided_operands_and_inputs_handed_on_keep_their_gradients() {
        let x = tensor(1, (2, 3));
        let inputs = [x.clone()];
        let turned = |x: &Tensor| noted(&[x], x.t()?, |dy| Ok(vec![Some(dy.t()?)]));
        let (results, record) =
            record(all(&inputs), || Ok([activation(&turned(&x)?, Activation::Silu)?, x.clone()])).unwrap();
        let dys = [tensor(2, (3, 2)), tensor(3, (2, 3))];
        let got = record.pull(results.to_vec(), dys.clone().map(Some).to_vec(), inputs.to_vec()).unwrap();
        let slope = |x: f32| {
            let s = 1.0 / (1.0 + (-x).exp());
            s * (1.0 + x * (1.0 - s))
        };
        let (dy, through) = (values(&dys[0].t().unwrap().contiguous().unwrap()), values(&dys[1]));
        let want: Vec<f32> = values(&x).iter().zip(dy).zip(through).map(|((x, dy), t)| slope(*x) * dy + t).collect();
        assert!(values(got[0].as_ref().unwrap()).iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn what_no_recorded_op_has_made_is_refused() {
        let x = tensor(1, (2, 2));
        let lost = record(all(std::slice::from_ref(&x)), || activation(&(&x + 1.0)?, Activation::Silu)).err().unwrap();
        assert!(lost.to_string().contains("that no recorded op has made"), "{lost}");
        let (y, record) = record(all(std::slice::from_ref(&x)), || &activation(&x, Activation::Silu)? + 1.0).unwrap();
        let lost = record.pull(vec![y], vec![Some(x.clone())], vec![x.clone()]).err().unwrap();
        assert!(lost.to_string().contains("made by no recorded op"), "{lost}");
        // Outside of a recording all is as it was.
        activation(&(&x + 1.0).unwrap(), Activation::Silu).unwrap();
    }
}
