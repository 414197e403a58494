//! Flat shapes on a flat ground, as pixels. Everything is a signed distance to an outline: negative inside, in units of
//! the shape's size.

use image::{Rgb, RgbImage};

/// Side of a picture in pixels.
pub const SIDE: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Circle,
    Square,
    Triangle,
    Star,
    Heart,
    Cross,
    Diamond,
    Ring,
}

impl Shape {
    pub const ALL: [(Shape, &str); 8] = [
        (Shape::Circle, "circle"),
        (Shape::Square, "square"),
        (Shape::Triangle, "triangle"),
        (Shape::Star, "star"),
        (Shape::Heart, "heart"),
        (Shape::Cross, "cross"),
        (Shape::Diamond, "diamond"),
        (Shape::Ring, "ring"),
    ];

    /// Whether the point (x right, y up) is inside the shape of size 1 around the origin.
    fn holds(self, x: f32, y: f32) -> bool {
        let r = x.hypot(y);
        match self {
            Shape::Circle => r < 0.9,
            Shape::Square => x.abs().max(y.abs()) < 0.8,
            Shape::Triangle => y > -0.7 && y < 0.95 - 1.75 * x.abs(),
            Shape::Star => in_star(x, y, r),
            Shape::Heart => {
                let (x, y) = (x * 1.15, y * 1.15 + 0.1);
                let edge = x * x + y * y - 0.75;
                edge * edge * edge < x * x * y * y * y
            }
            Shape::Cross => x.abs().min(y.abs()) < 0.3 && x.abs().max(y.abs()) < 0.9,
            Shape::Diamond => x.abs() * 1.35 + y.abs() < 0.95,
            Shape::Ring => (0.5..0.92).contains(&r),
        }
    }
}

/// Five points: between the lines from each tip to the notches beside it.
fn in_star(x: f32, y: f32, r: f32) -> bool {
    const TIP: f32 = 1.0;
    const NOTCH: f32 = 0.42;
    let fifth = std::f32::consts::TAU / 5.0;
    // The angle from the nearest tip, one of which points up.
    let angle = (x.atan2(y) + fifth / 2.0).rem_euclid(fifth) - fifth / 2.0;
    let (along, across) = (r * angle.cos(), r * angle.abs().sin());
    let (notch_along, notch_across) = (NOTCH * (fifth / 2.0).cos(), NOTCH * (fifth / 2.0).sin());
    // Left of the line from the tip to the notch.
    (notch_along - TIP) * across - notch_across * (along - TIP) > 0.0
}

/// One shape in its place.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    pub shape: Shape,
    pub colour: [u8; 3],
    /// Pixels from the left and from the top.
    pub centre: (f32, f32),
    /// Pixels from the centre to the outline, about.
    pub size: f32,
    /// Radians, clockwise.
    pub turn: f32,
}

impl Figure {
    fn holds(&self, column: f32, row: f32) -> bool {
        let (x, y) = ((column - self.centre.0) / self.size, (self.centre.1 - row) / self.size);
        let (sin, cos) = self.turn.sin_cos();
        self.shape.holds(x * cos - y * sin, x * sin + y * cos)
    }
}

/// Draws `figures`, later ones over earlier ones, with smooth edges: 16 samples a pixel.
pub fn draw(ground: [u8; 3], figures: &[Figure]) -> RgbImage {
    const FINE: u32 = 4;
    RgbImage::from_fn(SIDE, SIDE, |column, row| {
        let mut sum = [0u32; 3];
        for i in 0..FINE * FINE {
            let at = |pixel: u32, part: u32| pixel as f32 + (part as f32 + 0.5) / FINE as f32;
            let (x, y) = (at(column, i % FINE), at(row, i / FINE));
            let colour = figures.iter().rev().find(|f| f.holds(x, y)).map_or(ground, |f| f.colour);
            (0..3).for_each(|c| sum[c] += u32::from(colour[c]));
        }
        Rgb(sum.map(|s| ((s + FINE * FINE / 2) / (FINE * FINE)) as u8))
    })
}
